// Names: the cases of bag, which are not written yet.
