#define ISA v4
#define BYTES 64
#define TILE_ROWS 12
#include "isa.inc"
