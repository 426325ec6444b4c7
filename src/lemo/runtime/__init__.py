"""The executor: Transformers' own decoder layers on chosen rows."""
