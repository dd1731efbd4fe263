"""The mathematics of sparse video attention, in torch, on any device. Public names are FastVideo's.

A backend turns a grid of video tokens into a selection of tiles; a kernel reads only that selection.
"""
