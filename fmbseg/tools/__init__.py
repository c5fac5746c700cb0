"""What people who label images need around the method."""
