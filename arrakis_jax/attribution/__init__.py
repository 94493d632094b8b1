"""Attribution: which inputs and components caused this output? One method, one file."""
