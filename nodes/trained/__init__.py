"""What a sparse-trained file brings along: gates, its loader and its advice."""
