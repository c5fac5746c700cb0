"""What people look at: figures, charts and the explorer."""
