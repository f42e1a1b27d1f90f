"""Test: change one thing, exactly, and say what was done."""
