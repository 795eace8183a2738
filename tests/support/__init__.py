"""Shared by the tests: helpers, programs that tests kill, and real servers."""
