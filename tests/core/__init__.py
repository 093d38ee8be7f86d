"""Tests of what is in a region, without a mount."""
