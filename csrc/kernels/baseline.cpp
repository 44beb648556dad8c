#define ISA baseline
#define BYTES 16
#define TILE_ROWS 3
#include "isa.inc"
