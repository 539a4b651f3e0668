"""What a run measures, passed on to trackers as rounds are completed; knows no engine's inside."""
