"""The program inside the jail of `ctpo.train._bubblewrap`: standard library only, imported by no other module."""
