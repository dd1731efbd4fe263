"""STA strategies: search, measurement, files and pictures."""
