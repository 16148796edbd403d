"""Operations that take the time, each as plain torch defines it and as a device computes it."""
