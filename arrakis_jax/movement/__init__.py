"""Movement: how does the stream change on its way? One method, one file."""
