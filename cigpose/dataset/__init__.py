"""A user's own labelled people, before they are a dataset of params.yaml: their formats, guesses and faults."""
