"""`medqa compare`: runs are read, set side by side and shown on the console and as a page."""
