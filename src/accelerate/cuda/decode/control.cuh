// State of the rows of a batch, in device memory: 32-bit words [CONTROL_FIELDS][CONTROL_ROWS],
// so that a captured step needs no new arguments as rows start, grow and end.

#define CONTROL_ROWS 64

#define CONTROL_TOKEN 0        // input token
#define CONTROL_POSITION 1     // of this token, on all axes
#define CONTROL_END 2          // tokens held, this one included
#define CONTROL_FIRST 3        // first token that is no padding
#define CONTROL_TABLE 4        // the row's page table
#define CONTROL_ADAPTER 5      // index in the adapter table, -1 for the base
#define CONTROL_TOP_K 6        // 0: all
#define CONTROL_TEMPERATURE 7  // float; 0: the likeliest
#define CONTROL_TOP_P 8        // float; 1: all
#define CONTROL_MIN_P 9        // float; 0: all
#define CONTROL_PENALTY 10     // float; 1: none
#define CONTROL_UNIFORM 11     // float in [0, 1)
#define CONTROL_STEP 12        // steps done, where the step feeds its token back
#define CONTROL_MASK 13       // the row's mask of tokens seen
