"""Habits of this project that a program can check: commit subjects, words, versions."""
