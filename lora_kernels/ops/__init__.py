"""The torch.library boundary, one file per op: schema, fake, implementation, autograd, public function."""
