"""What can be split together, and the layout of every value."""
