// Names: the cases of graph_conv, which are not written yet.
