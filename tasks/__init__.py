from infra.lean import import_less

import_less()
