"""What comes of runs: their adapters loaded again, evaluated, asked, compared and exported."""
