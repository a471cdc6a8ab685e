"""Our answers to the exercises, a module per tutorial. Try yours first."""
