"""What jobs on many pictures share: they resume, they share the work among processes, they write files whole."""
