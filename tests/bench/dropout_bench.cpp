// Names: the cases of dropout, which are not written yet.
