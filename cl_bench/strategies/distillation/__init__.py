"""What the network said before a task is learned beside the task."""
