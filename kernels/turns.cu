// Control words in mapped host memory, in stream order, for devices whose streams cannot wait for words by themselves.
// Each word has one writer at a time, so plain loads and stores of 8 aligned bytes suffice. Launched with one thread.

__device__ __forceinline__ bool reached(const Count* word, const Count value)
{
    return static_cast<long long>(*static_cast<const volatile Count*>(word) - value) >= 0;  // cyclically
}

// await_word: returns when word >= value; what is enqueued behind it sees all that the word's writer stored before
//
// word: read, mapped host memory.   Bound by the one who writes it.

extern "C" __global__ void await_word(const Count* word, const Count value)
{
    while (!reached(word, value))
        __nanosleep(500);
    __threadfence_system();
}

// store_word: word <- value; who sees it sees all that was stored before on this stream
//
// word: written, mapped host memory.

extern "C" __global__ void store_word(Count* word, const Count value)
{
    __threadfence_system();
    *static_cast<volatile Count*>(word) = value;
}

// count_visit: word <- word + made;  copy <- word, if there is a copy
//
// word: read and written, mapped host memory, by the one who holds the block that it belongs to.   copy: written.

extern "C" __global__ void count_visit(Count* word, Count* copy, const Count made)
{
    const Count counted = *static_cast<const volatile Count*>(word) + made;
    *static_cast<volatile Count*>(word) = counted;
    if (copy)
        *static_cast<volatile Count*>(copy) = counted;
}

// fill_unless: y <- value, unless word = known: for what only the first visitor of a block in a round does
//
// y: write only, may be mapped host memory.   word: read, mapped host memory.   Any grid, as in vectors.cuh.

extern "C" __global__ void fill_unless(float* y, const float value, const Count* word, const Count known, const Count n)
{
    if (*static_cast<const volatile Count*>(word) == known)
        return;
    const auto one = [&](float& y) { y = value; };
    for_each(n, one, Written{y});
}
