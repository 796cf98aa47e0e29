"""The Lightning module, its callbacks and its command line, and the export of what was trained."""
