"""Checkpoints on disk: what a file or folder holds, under which names. Knows no ComfyUI; headers need no torch."""
