"""What the command `retrieval` can do, a module a group; each adds its flags and runs."""
