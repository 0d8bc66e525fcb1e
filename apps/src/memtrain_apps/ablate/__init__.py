"""Many runs side by side: ``ablate``, its grids and its report."""
