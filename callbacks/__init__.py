"""Lightning callbacks that any task can use; configs name them by class."""
