"""What a run says of itself: pure text from records and verdicts. Nothing here measures, imports torch or pytest."""
