"""A user's own labelled people, before they are a dataset of params.yaml: what they are, and what is wrong with them."""
