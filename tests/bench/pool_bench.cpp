// Names: the cases of pool, which are not written yet.
