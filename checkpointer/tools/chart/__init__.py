"""A chart of one run, as a picture or as a page."""
