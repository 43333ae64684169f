"""Links move slots between two live workers' pools and decide nothing."""
