#define ISA v3
#define BYTES 32
#define TILE_ROWS 6
#include "isa.inc"
