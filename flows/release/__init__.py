"""The release, stage by stage: candidate, measurements, repair, exports, approval."""
