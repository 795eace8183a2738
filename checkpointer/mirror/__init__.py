"""A second storage that gets a copy of each committed checkpoint."""
