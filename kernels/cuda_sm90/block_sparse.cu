// Block-sparse attention, forward, for sm_90a. Built with -DHEAD_DIM=64|128 -DHALF=0|1 (bfloat16|float16), with
// no header at all. README.md beside this file explains pipeline, barriers, layouts and their sources.
// One CTA computes two blocks of 64 queries of one head. Warps 0 and 1 load, warpgroups 1 and 2 compute one block
// each over its own list of key blocks; when both lists are equal, keys and values are loaded once for both.
// A block is a box of the token grid, read where the sequence has it, or 64 rows of a packed tensor.

enum : int {
    BLOCK = 64,                                          // slots of a block, rows of a warpgroup's product
    ELEMENT_BYTES = 2,
    PANEL_COLUMNS = 64,                                  // 128 bytes: the width of the swizzle
    ROW_BYTES = PANEL_COLUMNS * ELEMENT_BYTES,
    PANELS = HEAD_DIM / PANEL_COLUMNS,
    PANEL_BYTES = BLOCK * ROW_BYTES,
    SLOT_BYTES = PANELS * PANEL_BYTES,                   // one block of q, k or v
    SLOTS = 229376 / SLOT_BYTES,                         // 224 KB
    SLOT_ALIGNMENT = 1024,                               // the swizzle repeats after 8 rows
    BARRIER_BYTES = 8,
    FULL_OFFSET = SLOTS * SLOT_BYTES,
    EMPTY_OFFSET = FULL_OFFSET + SLOTS * BARRIER_BYTES,
    NOTES_OFFSET = EMPTY_OFFSET + SLOTS * BARRIER_BYTES,
    NOTE_BYTES = 8,                                      // keys: their mask; values: the first row to clear
    SHARED_BYTES = SLOT_ALIGNMENT + NOTES_OFFSET + SLOTS * NOTE_BYTES,

    THREADS = 384,
    CONSUMERS = 2,
    WARPGROUP = 128,
    WARPS_PER_CONSUMER = 4,
    PRODUCER_REGISTERS = 40,
    CONSUMER_REGISTERS = 232,
    WAIT_NANOSECONDS = 2000,                             // one try of a wait
    WAIT_TRIES = 1 << 16,                                // a wait makes so many tries without a clock,
    WAIT_TURNS = 3,                                      // then goes on until the clock's 4.3 s have turned so often

    COORDINATE_BITS = 10,                                // of a box's place along one axis of the grid
    LARGEST_COORDINATE = 1023,
    OUTSIDE = LARGEST_COORDINATE << 2 * COORDINATE_BITS,  // the place of a box of which nothing is in the grid

    // Matrix descriptors: byte offsets as the hardware wants them, divided by 16.
    DESCRIPTOR_SWIZZLE_128 = 1u << 30,                   // bits 62-63 of the descriptor hold 1
    K_STRIDE_BYTES = 8 * ROW_BYTES,                      // K-major: from 8 keys to the next 8
    K_LEADING_BYTES = 16,                                // K-major with swizzle: not used
    K_STEP_BYTES = 16 * ELEMENT_BYTES,                   // 16 dimensions on, inside a panel
    V_STRIDE_BYTES = 8 * ROW_BYTES,                      // MN-major: from 8 keys to the next 8
    V_LEADING_BYTES = PANEL_BYTES,                       // MN-major: from 64 dimensions to the next 64
    V_STEP_BYTES = 16 * ROW_BYTES,                       // 16 keys on

    LARGEST_RISE = 8,                                    // binary orders by which scores may exceed the peak in use

    SCORES = BLOCK / 2,                                  // a thread's scores of one key block
    WEIGHTS = SCORES / 2,                                // the same as packed pairs
    Q_FRAGMENTS = HEAD_DIM / 4,
    OUTPUTS = HEAD_DIM / 2,
    STEPS_PER_PANEL = PANEL_COLUMNS / 16,
};

static_assert(SHARED_BYTES <= 232448, "more shared memory than an H100 gives to one CTA");
static_assert(SLOTS % CONSUMERS == 0, "the two rings share the slots evenly");
static_assert(LARGEST_COORDINATE + 1 == 1 << COORDINATE_BITS, "");
static_assert(SLOTS <= 32, "the producer notes one bit per slot");

struct alignas(128) TensorMap { unsigned long long opaque[16]; };

// The blocks that are boxes of a token grid. Axes in the order t, h, w; a tile is cut into `parts` boxes.
struct Boxes {
    int blocks;                                              // 0: every block lies packed
    int prefix;                                              // tokens before the grid
    int rows;                                                // of a box, 1..64
    int parts;                                               // boxes in a tile
    int grid[3], tiles[3], tile[3], cuts[3], box[3];         // cuts: boxes along an axis of a tile
    unsigned long long masks[8];                             // of a box by the axes that the grid's edge cuts: 4 t, 2 h, 1 w
};

// Where a coarse branch comes from. means: null without one.
struct Coarse {
    const unsigned short* gate;
    const float* means;
    long long gate_row, gate_head, mean_head, mean_tile;     // strides in elements
    int tiles, blocks_per_tile;
};

// What query blocks have seen before their lists: the mean of its values and the natural log of its sum of
// exponentials, -inf for nothing. lse: null without any.
struct Start {
    const float *means, *lse;
    long long mean_batch, mean_head, mean_tile, lse_batch, lse_head, lse_tile;       // strides in elements
    int tiles, blocks_per_tile;
};

// The machine: everything below that is not plain C++. The tests put an emulator of it in this place.

#if HALF
#define ELEMENT "f16"
#else
#define ELEMENT "bf16"
#endif

#define DEVICE __device__ __forceinline__
#define GLOBAL extern "C" __global__
#define KERNEL_PARAMETER const __grid_constant__

extern __shared__ unsigned char shared_memory[];

// volatile: read again where needed, instead of held in registers through the loop.
#define SPECIAL_REGISTER(name, source) \
    DEVICE int name() { int value; asm volatile("mov.u32 %0, " source ";" : "=r"(value)); return value; }
SPECIAL_REGISTER(thread_index, "%%tid.x")
SPECIAL_REGISTER(block_x, "%%ctaid.x")
SPECIAL_REGISTER(block_y, "%%ctaid.y")
SPECIAL_REGISTER(block_z, "%%ctaid.z")
SPECIAL_REGISTER(blocks_y, "%%nctaid.y")

DEVICE unsigned shared_base() {
    return ((unsigned)__cvta_generic_to_shared(shared_memory) + SLOT_ALIGNMENT - 1) & ~(SLOT_ALIGNMENT - 1u);
}

template <int N> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
DEVICE void stop_kernel() { asm volatile("trap;"); }

DEVICE void barrier_init(unsigned barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void barrier_arrive(unsigned barrier) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" :: "r"(barrier) : "memory");
}

DEVICE void barrier_arrive_expect(unsigned barrier, unsigned bytes) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}"
                 :: "r"(barrier), "r"(bytes) : "memory");
}

DEVICE bool barrier_try_wait(unsigned barrier, unsigned parity) {
    unsigned done;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(barrier), "r"(parity), "r"(WAIT_NANOSECONDS) : "memory");
    return done;
}

// How often the low half of the clock, 2^32 ns, has turned.
DEVICE unsigned clock_turns() {
    unsigned turns;
    asm volatile("mov.u32 %0, %%globaltimer_hi;" : "=r"(turns));
    return turns;
}

DEVICE void map_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}

// One box of a rank-5 tensor map into a slot, coordinates innermost first.
DEVICE void copy_box(unsigned slot, const TensorMap* map, unsigned barrier, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
                 :: "r"(slot), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

DEVICE int shared_read(unsigned address) {
    int value;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

DEVICE void shared_write(unsigned address, int value) {
    asm volatile("st.shared.s32 [%0], %1;" :: "r"(address), "r"(value) : "memory");
}

DEVICE void shared_clear_16(unsigned address) {
    asm volatile("st.shared.v4.s32 [%0], {%1, %1, %1, %1};" :: "r"(address), "r"(0) : "memory");
}

DEVICE void load_matrices(unsigned (&q)[Q_FRAGMENTS], int first, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q[first]), "=r"(q[first + 1]), "=r"(q[first + 2]), "=r"(q[first + 3])
                 : "r"(address) : "memory");
}

DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void sync_cta() { asm volatile("barrier.cta.sync 0;" ::: "memory"); }
DEVICE void sync_threads(int barrier, int threads) {
    asm volatile("barrier.cta.sync %0, %1;" :: "r"(barrier), "r"(threads) : "memory");
}
DEVICE void sync_warp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

DEVICE bool all_in_cta(bool vote) {
    unsigned all;
    asm volatile("{.reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.cta.red.and.pred q, 0, p; selp.u32 %0, 1, 0, q;}"
                 : "=r"(all) : "r"((unsigned)vote) : "memory");
    return all;
}

DEVICE bool any_in_warp(bool vote) {
    unsigned any;
    asm volatile("{.reg .pred p, q; setp.ne.u32 p, %1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.u32 %0, 1, 0, q;}"
                 : "=r"(any) : "r"((unsigned)vote));
    return any;
}

DEVICE int from_lane(int value, int lane) {
    int result;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(result) : "r"(value), "r"(lane));
    return result;
}

DEVICE float from_lane_xor(float value, int mask) {
    float result;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(result) : "f"(value), "r"(mask));
    return result;
}

DEVICE int ones_in(unsigned bits) { int n; asm("popc.b32 %0, %1;" : "=r"(n) : "r"(bits)); return n; }

// -inf, the score of a key that is not there.
DEVICE float none() { float x; asm("mov.b32 %0, 0xff800000;" : "=f"(x)); return x; }
DEVICE float exp2_of(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float log2_of(float x) { float y; asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float larger(float x, float y) { float z; asm("max.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y)); return z; }
DEVICE float multiply_add(float x, float y, float z) {
    float r; asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(x), "f"(y), "f"(z)); return r;
}

DEVICE unsigned packed(float low, float high) {
    unsigned pair;
    asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The two halves of a packed pair.
#if HALF
DEVICE float low_of(unsigned pair) {
    float x; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(pair)); return x;
}
DEVICE float high_of(unsigned pair) {
    float x; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(pair)); return x;
}
#else
DEVICE float low_of(unsigned pair) { return __uint_as_float(pair << 16); }
DEVICE float high_of(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
#endif

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}

// Keeps reads of registers that wgmma writes behind the wait before it, and writes before the next wgmma.
template <int N> DEVICE void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i]) :: "memory");
}

#define F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define F16(x, i) F4(x, i), F4(x, i + 4), F4(x, i + 8), F4(x, i + 12)
#define F32(x, i) F16(x, i), F16(x, i + 16)
#define D32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D64 D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
    "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FRAGMENT(x, i) "r"(x[i]), "r"(x[i + 1]), "r"(x[i + 2]), "r"(x[i + 3])

DEVICE unsigned long long descriptor(unsigned low, unsigned high) {
    unsigned long long both;
    asm("mov.b64 %0, {%1, %2};" : "=l"(both) : "r"(low), "r"(high));
    return both;
}

// scores[FIRST..] (+)= 16 dimensions of q, from registers, times those of 64 keys.
template <int FIRST, int ACCUMULATE>
DEVICE void wgmma_scores(float (&s)[2 * SCORES], const unsigned (&q)[Q_FRAGMENTS], int step, unsigned low, unsigned high) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT "." ELEMENT " " D32 "}, "
                 "{%32, %33, %34, %35}, %36, %37, 1, 1, 0;"
                 : F32(s, FIRST) : FRAGMENT(q, 4 * step), "l"(descriptor(low, high)), "n"(ACCUMULATE));
}

// out += the weights of 16 keys, from registers, times their values.
DEVICE void wgmma_outputs(float (&o)[OUTPUTS], const unsigned (&p)[2 * WEIGHTS], int step, unsigned low, unsigned high) {
#if HEAD_DIM == 128
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." ELEMENT "." ELEMENT " " D64 "}, "
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : F32(o, 0), F32(o, 32) : FRAGMENT(p, 4 * step), "l"(descriptor(low, high)));
#else
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT "." ELEMENT " " D32 "}, "
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : F32(o, 0) : FRAGMENT(p, 4 * step), "l"(descriptor(low, high)));
#endif
}

// The kernel, in terms of the above.

// Gives up only after many tries and then a long time: a hint of which nothing is made lets tries pass fast, a kernel
// that others keep off the device lets time pass without a try. Other forms of these loops make ptxas spill.
DEVICE void wait(unsigned barrier, unsigned parity) {
#pragma unroll 1
    for (int tries = 0; tries < WAIT_TRIES; ++tries)
        if (barrier_try_wait(barrier, parity)) return;
    unsigned start = clock_turns();
#pragma unroll 1
    do if (barrier_try_wait(barrier, parity)) return;
    while (clock_turns() - start < WAIT_TURNS);
    stop_kernel();
}

struct Mask { unsigned low, high; };                          // bit i: key i of a block is there

DEVICE Mask first_keys(int size) {
    return {size >= 32 ? ~0u : (1u << size) - 1, size >= 64 ? ~0u : size <= 32 ? 0 : (1u << (size - 32)) - 1};
}

DEVICE int keys_in(Mask mask) { return ones_in(mask.low) + ones_in(mask.high); }

// The place of a box in the grid, and how many of its tokens are inside along every axis.
struct Box {
    int at[3], inside[3];

    DEVICE Box(const Boxes& boxes, int block) {
        int part = block % boxes.parts, tile = block / boxes.parts;
#pragma unroll
        for (int axis = 2; axis >= 0; --axis) {
            at[axis] = tile % boxes.tiles[axis] * boxes.tile[axis] + part % boxes.cuts[axis] * boxes.box[axis];
            tile /= boxes.tiles[axis];
            part /= boxes.cuts[axis];
            int left = boxes.grid[axis] - at[axis];
            inside[axis] = left < 0 ? 0 : left > boxes.box[axis] ? boxes.box[axis] : left;
        }
    }
    // Its coordinates in one number.
    DEVICE int place() const { return at[0] << 2 * COORDINATE_BITS | at[1] << COORDINATE_BITS | at[2]; }
    DEVICE Mask mask(const Boxes& boxes) const {
        int cut = 0;
        bool empty = false;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
            cut = 2 * cut + (inside[axis] < boxes.box[axis]);
            empty |= inside[axis] == 0;
        }
        unsigned long long all = boxes.masks[cut];
        if (empty) all = 0;
        return {(unsigned)all, (unsigned)(all >> 32)};
    }
    // Row of the sequence that lies in a slot of the box, -1 for none.
    DEVICE long long row(const Boxes& boxes, int slot) const {
        int w = slot % boxes.box[2], h = slot / boxes.box[2] % boxes.box[1], t = slot / boxes.box[2] / boxes.box[1];
        if (t >= inside[0] || h >= inside[1] || w >= inside[2]) return -1;
        return boxes.prefix + ((long long)(at[0] + t) * boxes.grid[1] + at[1] + h) * boxes.grid[2] + at[2] + w;
    }
};

// Where a block is: the coordinates of a box, or below 0 the number of a packed block.
DEVICE int place_of(const Boxes& boxes, int block) {
    return block < boxes.blocks ? Box(boxes, block).place() : boxes.blocks - block - 1;
}

// A run of slots, filled, read and emptied in one order. `phase` flips with every turn.
struct Ring {
    unsigned base;
    int first, end, slot, oldest;
    unsigned phase;

    DEVICE Ring(unsigned base, int consumer, bool one_for_both)
        : base(base), first(one_for_both ? 0 : consumer * (SLOTS / CONSUMERS)),
          end(one_for_both ? SLOTS : first + SLOTS / CONSUMERS), slot(first), oldest(first), phase(0) {}
    DEVICE unsigned data(int i) const { return base + i * SLOT_BYTES; }
    DEVICE unsigned full(int i) const { return base + FULL_OFFSET + i * BARRIER_BYTES; }
    DEVICE unsigned empty(int i) const { return base + EMPTY_OFFSET + i * BARRIER_BYTES; }
    DEVICE unsigned note(int i) const { return base + NOTES_OFFSET + i * NOTE_BYTES; }
    DEVICE void advance() {
        if (++slot == end) {
            slot = first;
            phase ^= 1;
        }
    }
    DEVICE int take() {                                      // the next slot, once it is full
        int taken = slot;
        wait(full(taken), phase);
        advance();
        return taken;
    }
    DEVICE unsigned held(int n) const {                      // address of the n-th slot taken and not released, 0..3
        int i = oldest + n;
        return data(i < end ? i : i - end + first);
    }
    DEVICE Mask release(int lane) {                          // the oldest one taken, by every warp that has read it
        Mask mask = {(unsigned)shared_read(note(oldest)), (unsigned)shared_read(note(oldest) + 4)};
        sync_warp();
        if (lane == 0) barrier_arrive(empty(oldest));
        if (++oldest == end) oldest = first;
        return mask;
    }
};

// One query block's list, read by a whole warp, 32 entries at a time and 32 ahead. entries null: every block.
struct List {
    const Boxes& boxes;
    const int* entries;
    const int* block_sizes;
    long long stride;
    int count, blocks, lane;
    int place, next_place;
    Mask mask, next_mask;

    DEVICE List(const Boxes& boxes, const int* entries, long long stride, int count, const int* block_sizes, int blocks,
                int lane)
        : boxes(boxes), entries(entries), block_sizes(block_sizes), stride(stride), count(count), blocks(blocks),
          lane(lane), place(0), next_place(0), mask{}, next_mask{} { ahead(0); }
    DEVICE void ahead(int i) {
        i += lane;
        int block = i >= count ? 0 : entries ? entries[i * stride] : i;
        bool known = block >= 0 && block < blocks;           // an entry that names no block is an empty one
        next_mask = {0, 0};
        next_place = boxes.blocks > 0 ? OUTSIDE : -1;
        if (known && block < boxes.blocks) {
            Box box(boxes, block);
            next_mask = box.mask(boxes);
            next_place = box.place();
        } else if (known) {
            next_mask = first_keys(block_sizes[block]);
            next_place = boxes.blocks - block - 1;
        }
    }
    DEVICE void get(int i, int& found_place, Mask& found_mask) {  // i = 0, 1, 2, ... in turn
        if (i % 32 == 0) {
            place = next_place;
            mask = next_mask;
            ahead(i + 32);
        }
        found_place = from_lane(place, i % 32);
        found_mask = {(unsigned)from_lane(mask.low, i % 32), (unsigned)from_lane(mask.high, i % 32)};
    }
};

// The two tensor maps of q, k or v: dimensions of a box's are 64 columns, w, h, t, head, and of a packed block's
// 64 columns, slot, panel, head, batch.
struct Maps { const TensorMap *boxes, *packed; };

// Loads blocks into a ring. A box of fewer than 64 rows leaves the rest of its slot as it is. Whatever lies there at
// the start may be NaN: the consumer clears it when it first takes values from a slot, which `stale` has a bit for.
// Later boxes leave the zeros alone, and a packed block comes after all boxes, since a list ascends.
struct Loader {
    Ring ring;
    const Boxes& boxes;
    int head, batch, lane;
    unsigned stale;

    DEVICE Loader(const Ring& ring, const Boxes& boxes, int head, int batch, int lane)
        : ring(ring), boxes(boxes), head(head), batch(batch), lane(lane), stale(~0u) {}
    DEVICE void put(Maps maps, int place, Mask note) {
        wait(ring.empty(ring.slot), ring.phase ^ 1);
        if (lane == 0) {
            unsigned slot = ring.data(ring.slot), barrier = ring.full(ring.slot);
            shared_write(ring.note(ring.slot), note.low);
            shared_write(ring.note(ring.slot) + 4, note.high);
            if (place < 0) {
                barrier_arrive_expect(barrier, SLOT_BYTES);
                copy_box(slot, maps.packed, barrier, 0, (-1 - place) * BLOCK, 0, head, batch);
            } else {
                barrier_arrive_expect(barrier, boxes.rows * PANELS * ROW_BYTES);
#pragma unroll
                for (int panel = 0; panel < PANELS; ++panel)
                    copy_box(slot + panel * PANEL_BYTES, maps.boxes, barrier, panel * PANEL_COLUMNS,
                             place & LARGEST_COORDINATE, place >> COORDINATE_BITS & LARGEST_COORDINATE,
                             place >> 2 * COORDINATE_BITS, head);
            }
        }
        sync_warp();
        ring.advance();
    }
    // valid: how many rows of a packed block are.
    DEVICE void put_values(Maps maps, int place, int valid) {
        int keep = place < 0 ? valid : stale >> ring.slot & 1 ? boxes.rows : BLOCK;
        stale &= ~(1u << ring.slot);
        put(maps, place, {(unsigned)keep, 0});
    }
};

DEVICE void load_query_fragments(unsigned (&q)[Q_FRAGMENTS], unsigned slot, int warp, int lane) {
    int row = warp * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        int chunk = step % STEPS_PER_PANEL * 2 + lane / 16;
        load_matrices(q, 4 * step, slot + step / STEPS_PER_PANEL * PANEL_BYTES + row * ROW_BYTES
                                       + (chunk ^ row % 8) * 16);
    }
}

template <int FIRST>
DEVICE void multiply_keys(float (&s)[2 * SCORES], const unsigned (&q)[Q_FRAGMENTS], unsigned slot) {
    unsigned low = slot >> 4 | (K_LEADING_BYTES >> 4) << 16, high = K_STRIDE_BYTES >> 4 | DESCRIPTOR_SWIZZLE_128;
    wgmma_scores<FIRST, 0>(s, q, 0, low, high);
#pragma unroll
    for (int step = 1; step < HEAD_DIM / 16; ++step)
        wgmma_scores<FIRST, 1>(s, q, step, low + (step / STEPS_PER_PANEL * PANEL_BYTES >> 4)
                                               + (step % STEPS_PER_PANEL * K_STEP_BYTES >> 4), high);
}

template <int FIRST>
DEVICE void multiply_values(float (&o)[OUTPUTS], const unsigned (&p)[2 * WEIGHTS], unsigned slot) {
    unsigned low = slot >> 4 | (V_LEADING_BYTES >> 4) << 16, high = V_STRIDE_BYTES >> 4 | DESCRIPTOR_SWIZZLE_128;
#pragma unroll
    for (int step = 0; step < BLOCK / 16; ++step)
        wgmma_outputs(o, p, FIRST / 4 + step, low + (step * V_STEP_BYTES >> 4), high);
}

// Takes a block of values. Rows behind the valid ones may hold NaN, which a weight of 0 does not remove.
DEVICE void take_values(Ring& ring, int consumer) {
    int slot = ring.take(), keep = shared_read(ring.note(slot));
    if (keep == BLOCK) return;
    for (int panel = 0; panel < PANELS; ++panel)
        for (int at = keep * ROW_BYTES + thread_index() % WARPGROUP * 16; at < PANEL_BYTES; at += WARPGROUP * 16)
            shared_clear_16(ring.data(slot) + panel * PANEL_BYTES + at);
    fence_async_proxy();
    sync_threads(1 + consumer, WARPGROUP);
}

template <int FIRST>
DEVICE void mask_keys(float (&s)[2 * SCORES], Mask mask, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        unsigned there = half ? mask.high : mask.low;
        if (there == ~0u) continue;
        there >>= lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < SCORES / 2; ++i)
            if (!(there >> (i / 4 * 8 + i % 2) & 1)) s[FIRST + half * (SCORES / 2) + i] = none();
    }
}

// Scores to weights, not normalised. decay: what has been summed so far is to be multiplied by it, exactly 1 where the
// peak stays. It stays while no score is 2^LARGEST_RISE times above it: such weights still fit, and a rescale is saved.
template <int N>
DEVICE void softmax(float (&s)[2 * SCORES], float (&peak)[2], float (&total)[2], float (&decay)[2], float scale) {
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float top = peak[r];
#pragma unroll
        for (int i = 2 * r; i < N; i += 4) top = larger(larger(top, s[i]), s[i + 1]);
        top = larger(top, from_lane_xor(top, 1));
        top = larger(top, from_lane_xor(top, 2));
        if ((top - peak[r]) * scale <= LARGEST_RISE) top = peak[r];
        shift[r] = top == none() ? 0.0f : top * scale;
        decay[r] = top == peak[r] ? 1.0f : exp2_of((peak[r] - top) * scale);
        peak[r] = top;
        total[r] *= decay[r];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        int r = i / 2 % 2;
        s[i] = exp2_of(multiply_add(s[i], scale, -shift[r]));
        total[r] += s[i];
    }
}

// Where the softmax of this warpgroup's rows begins. Of a row's sum each of its four threads holds a quarter.
DEVICE void begin(float (&o)[OUTPUTS], float (&peak)[2], float (&total)[2], const Start& start, int block,
                  float scale) {
    int tile = start.lse ? block / start.blocks_per_tile : 0, head = block_y(), batch = block_z();
    if (tile >= start.tiles) return;
    float seen = start.lse[batch * start.lse_batch + head * start.lse_head + tile * start.lse_tile];
    if (seen == none()) return;
    const float* mean = start.means + batch * start.mean_batch + head * start.mean_head + tile * start.mean_tile
                        + thread_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) o[i] = mean[i / 4 * 8 + i % 2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        peak[r] = seen * 1.4426950408889634f / scale;
        total[r] = 0.25f;
    }
}

// Called only when no product is in flight that reads p or writes o.
template <int N>
DEVICE void next_weights(unsigned (&p)[2 * WEIGHTS], float (&s)[2 * SCORES], float (&o)[OUTPUTS], const float (&decay)[2]) {
    pin(s);
    pin(o);
    if (any_in_warp(decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) o[i] *= decay[i / 2 % 2];
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) p[i] = packed(s[2 * i], s[2 * i + 1]);
}

// Values of a step come after the keys of the next one; the first of an odd number of blocks is a step of its own.
DEVICE void produce(Loader loader, Maps q, Maps k, Maps v, List list, int first_query, int queries) {
#pragma unroll 1
    for (int i = 0; i < queries; ++i) loader.put(q, place_of(loader.boxes, first_query + i), Mask{});
    int at = 0, place_a = 0, place_b = 0, valid_a = 0, valid_b = 0;
    bool values_due = false;
#pragma unroll 1
    while (at < list.count) {
        int blocks = (list.count - at) % 2 ? 1 : 2, due_a = place_a, due_b = place_b, due_valid_a = valid_a, due_valid_b = valid_b;
#pragma unroll 1
        for (int i = 0; i < blocks; ++i) {
            Mask mask;
            place_a = place_b, valid_a = valid_b;
            list.get(at++, place_b, mask);
            valid_b = keys_in(mask);
            loader.put(k, place_b, mask);
        }
        if (blocks == 1) {
            loader.put_values(v, place_b, valid_b);
            continue;
        }
        if (values_due) {
            loader.put_values(v, due_a, due_valid_a);
            loader.put_values(v, due_b, due_valid_b);
        }
        values_due = true;
    }
    if (values_due) {
        loader.put_values(v, place_a, valid_a);
        loader.put_values(v, place_b, valid_b);
    }
}

DEVICE void consume(unsigned base, int count, float scale, int consumer, bool one_for_both,
                    float (&o)[OUTPUTS], float (&peak)[2], float (&total)[2]) {
    int lane = thread_index() % 32, warp = thread_index() / 32 % WARPS_PER_CONSUMER;
    Ring ring(base, consumer, one_for_both);
    float s[2 * SCORES], decay[2];
    unsigned q[Q_FRAGMENTS], p[2 * WEIGHTS];
    for (int i = 0; i <= (int)one_for_both; ++i) {
        ring.take();
        if (i == consumer || !one_for_both) load_query_fragments(q, ring.held(0), warp, lane);
        ring.release(lane);
    }
    if (count % 2) {
        ring.take();
        wgmma_fence();
        multiply_keys<0>(s, q, ring.held(0));
        wgmma_commit();
        wgmma_wait<0>();
        pin(s);
        mask_keys<0>(s, ring.release(lane), lane);
        softmax<SCORES>(s, peak, total, decay, scale);
        next_weights<SCORES>(p, s, o, decay);
        take_values(ring, consumer);
        pin(o);
        wgmma_fence();
        multiply_values<0>(o, p, ring.held(0));
        wgmma_commit();
        wgmma_wait<0>();
        pin(o);
        ring.release(lane);
    }
    int pairs = count / 2;
    if (pairs == 0) return;
    ring.take();
    ring.take();
    wgmma_fence();
    multiply_keys<0>(s, q, ring.held(0));
    multiply_keys<SCORES>(s, q, ring.held(1));
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
    mask_keys<0>(s, ring.release(lane), lane);
    mask_keys<SCORES>(s, ring.release(lane), lane);
    softmax<2 * SCORES>(s, peak, total, decay, scale);
    next_weights<2 * SCORES>(p, s, o, decay);
    if (pairs > 1) ring.take(), ring.take();
#pragma unroll 1
    while (pairs > 1) {
        pin(s);
        wgmma_fence();
        multiply_keys<0>(s, q, ring.held(0));
        multiply_keys<SCORES>(s, q, ring.held(1));
        wgmma_commit();
        take_values(ring, consumer);
        take_values(ring, consumer);
        pin(o);
        wgmma_fence();
        multiply_values<0>(o, p, ring.held(2));
        multiply_values<WEIGHTS>(o, p, ring.held(3));
        wgmma_commit();
        wgmma_wait<1>();
        pin(s);
        mask_keys<0>(s, ring.release(lane), lane);
        mask_keys<SCORES>(s, ring.release(lane), lane);
        softmax<2 * SCORES>(s, peak, total, decay, scale);
        pin(s);
        // Between the weights and the wait on purpose: without a branch there ptxas moves the wait up.
        if (--pairs > 1) ring.take(), ring.take();
        wgmma_wait<0>();
        ring.release(lane);
        ring.release(lane);
        next_weights<2 * SCORES>(p, s, o, decay);
    }
    take_values(ring, consumer);
    take_values(ring, consumer);
    pin(o);
    wgmma_fence();
    multiply_values<0>(o, p, ring.held(0));
    multiply_values<WEIGHTS>(o, p, ring.held(1));
    wgmma_commit();
    wgmma_wait<0>();
    pin(o);
}

// This warpgroup's 64 rows of out and lse.
DEVICE void store(const float (&o)[OUTPUTS], const float (&peak)[2], const float (&total)[2], float scale, int block,
                  const Boxes& boxes, const int* packed_rows, const Coarse& coarse, unsigned short* out, float* lse,
                  int tokens) {
    int lane = thread_index() % 32, warp = thread_index() / 32 % WARPS_PER_CONSUMER;
    int head = block_y(), heads = blocks_y(), batch = block_z();
    bool is_box = block < boxes.blocks;
    Box box(boxes, is_box ? block : 0);
    int tile = block / coarse.blocks_per_tile;
    bool combined = coarse.means && tile < coarse.tiles;
    const float* mean = coarse.means + head * coarse.mean_head + tile * coarse.mean_tile + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float sum = total[r] + from_lane_xor(total[r], 1);
        sum += from_lane_xor(sum, 2);
        int slot = warp * 16 + lane / 4 + 8 * r, packed_slot = (block - boxes.blocks) * BLOCK + slot;
        long long row = is_box ? box.row(boxes, slot) : packed_rows ? packed_rows[packed_slot] : packed_slot;
        if (row < 0) continue;
        float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        unsigned* line = (unsigned*)(out + ((batch * (long long)tokens + row) * heads + head) * HEAD_DIM) + lane % 4;
        const unsigned* gate = (const unsigned*)(coarse.gate + row * coarse.gate_row + head * coarse.gate_head) + lane % 4;
#pragma unroll
        for (int i = 2 * r; i < OUTPUTS; i += 4) {
            float low = o[i] * inverse, high = o[i + 1] * inverse;
            if (combined) {
                unsigned gates = gate[i / 4 * 4];
                low = multiply_add(low_of(gates), mean[i / 4 * 8], low);
                high = multiply_add(high_of(gates), mean[i / 4 * 8 + 1], high);
            }
            line[i / 4 * 4] = packed(low, high);
        }
        if (lse && lane % 4 == 0)
            lse[((long long)batch * heads + head) * tokens + row] = (peak[r] * scale + log2_of(sum)) * 0.6931471805599453f;
    }
}

// Launched over (query blocks / 2 rounded up, heads, batch) with THREADS threads and SHARED_BYTES.
// scale_log2e: softmax scale times log2(e), above 0. out: [batch, tokens, heads, HEAD_DIM], lse: [batch, heads, tokens]
// or null, both contiguous. Strides of indices and counts are in elements. Query blocks from `lists` on have no list:
// they attend to every block. packed_rows: the row of the sequence in every slot of the packed blocks, -1 for none;
// null: slot by slot. With boxes the batch is 1.
GLOBAL void __launch_bounds__(THREADS, 1) block_sparse_forward(
    KERNEL_PARAMETER TensorMap q_boxes, KERNEL_PARAMETER TensorMap k_boxes, KERNEL_PARAMETER TensorMap v_boxes,
    KERNEL_PARAMETER TensorMap q_packed, KERNEL_PARAMETER TensorMap k_packed, KERNEL_PARAMETER TensorMap v_packed,
    KERNEL_PARAMETER Boxes boxes, KERNEL_PARAMETER Coarse coarse, KERNEL_PARAMETER Start start,
    unsigned short* out, float* lse, const int* indices, const int* counts, const int* block_sizes,
    const int* packed_rows,
    long long stride_ib, long long stride_ih, long long stride_iq, long long stride_ik,
    long long stride_cb, long long stride_ch, long long stride_cq,
    int longest, int lists, int query_blocks, int key_blocks, int tokens, float scale_log2e) {
    int head = block_y(), batch = block_z(), pairs = (query_blocks + 1) / CONSUMERS;
    // Those without a list have the most to do: they start first.
    int first = (block_x() + lists / CONSUMERS) % pairs * CONSUMERS;
    unsigned base = shared_base();
    const int* list = indices + batch * stride_ib + head * stride_ih + first * stride_iq;
    const int* length = counts + batch * stride_cb + head * stride_ch + first * stride_cq;
    bool dense_0 = first >= lists, dense_1 = first + 1 >= lists;
    int count_0 = dense_0 ? key_blocks : length[0];
    int count_1 = first + 1 >= query_blocks ? 0 : dense_1 ? key_blocks : length[stride_cq];
    int most_0 = dense_0 ? key_blocks : longest, most_1 = dense_1 ? key_blocks : longest;
    count_0 = count_0 < 0 ? 0 : count_0 > most_0 ? most_0 : count_0;
    count_1 = count_1 < 0 ? 0 : count_1 > most_1 ? most_1 : count_1;

    bool same = count_0 == count_1 && count_0 > 0 && dense_0 == dense_1;
    if (same && !dense_0)
        for (int i = thread_index(); i < count_0; i += THREADS)
            same &= list[i * stride_ik] == list[stride_iq + i * stride_ik];
    bool one_for_both = all_in_cta(same);

    int group = thread_index() / WARPGROUP;
    if (thread_index() == 0) {
        if (boxes.blocks > 0) {
            map_prefetch(&q_boxes);
            map_prefetch(&k_boxes);
            map_prefetch(&v_boxes);
        }
        if (boxes.blocks < key_blocks) {
            map_prefetch(&q_packed);
            map_prefetch(&k_packed);
            map_prefetch(&v_packed);
        }
#pragma unroll 1
        for (int i = 0; i < SLOTS; ++i) {
            barrier_init(base + FULL_OFFSET + i * BARRIER_BYTES, 1);
            barrier_init(base + EMPTY_OFFSET + i * BARRIER_BYTES,
                         one_for_both ? CONSUMERS * WARPS_PER_CONSUMER : WARPS_PER_CONSUMER);
        }
        barrier_init_fence();
    }
    sync_cta();

    if (group == 0) {
        give_registers<PRODUCER_REGISTERS>();
        int consumer = thread_index() / 32, lane = thread_index() % 32;
        int count = consumer == 0 ? count_0 : count_1;
        const int* own = (consumer == 0 ? dense_0 : dense_1) ? nullptr : list + consumer * stride_iq;
        if (consumer < (one_for_both ? 1 : CONSUMERS) && count > 0)
            produce(Loader(Ring(base, consumer, one_for_both), boxes, head, batch, lane),
                    {&q_boxes, &q_packed}, {&k_boxes, &k_packed}, {&v_boxes, &v_packed},
                    List(boxes, own, stride_ik, count, block_sizes, key_blocks, lane),
                    first + consumer, one_for_both ? CONSUMERS : 1);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        int consumer = group - 1, count = consumer == 0 ? count_0 : count_1;
        float o[OUTPUTS] = {}, peak[2] = {none(), none()}, total[2] = {};
        begin(o, peak, total, start, first + consumer, scale_log2e);
        if (count > 0) consume(base, count, scale_log2e, consumer, one_for_both, o, peak, total);
        if (first + consumer < query_blocks)
            store(o, peak, total, scale_log2e, first + consumer, boxes, packed_rows, coarse, out, lse, tokens);
    }
}
