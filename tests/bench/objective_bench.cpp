// Names: the cases of objective, which are not written yet.
