"""Import paths of the first interface; everything lives in `bkcore`."""
