"""Operations with more than one implementation: the plain version, the fast ones, and the choice between them."""
