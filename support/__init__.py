"""What serves the algorithm and is no part of it. Nothing here imports the top level."""
