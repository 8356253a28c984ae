"""`medqa compare`: read several runs, compare them, and show the result on the console and as a page."""
