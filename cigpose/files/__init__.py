"""What knows bytes and nothing of people. Uses nothing else of ours."""
