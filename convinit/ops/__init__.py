"""One op a file: public function, argument checks, reference in plain PyTorch, fake kernel."""
