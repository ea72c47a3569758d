"""A catalog that the project draws itself, for machines that have no other."""
