// iq_check_all FOLDER...: opens every bundle in one process and prints its exit code and reason.
#include <cstdio>

#include "iq/bundle.h"

int main(int argc, char** argv)
{
    for (int i = 1; i < argc; ++i)
    {
        auto const bundle = iq::Bundle::open(argv[i]);
        if (bundle)
        {
            // What a caller asks next must not fall over either.
            static_cast<void>(bundle.value().eosIds());
            for (iq::GraphInfo const& graph : bundle.value().manifest().graphs)
            {
                for (auto const& [name, engine] : graph.engines)
                {
                    static_cast<void>(bundle.value().cacheSize(graph, engine));
                }
            }
        }
        std::string reason = bundle ? "" : bundle.error().text();
        for (char& letter : reason)
        {
            letter = letter == '\n' ? '|' : letter;
        }
        std::printf("%d\t%s\n", bundle ? 0 : static_cast<int>(bundle.error().code), reason.c_str());
    }
    return 0;
}
