// iq_example BUNDLE: the smallest service there is.
#include <cstdio>

#include <iq/bundle.h>
#include <iq/text_session.h>

int main(int argc, char** argv)
{
    auto bundle = iq::Bundle::open(argc > 1 ? argv[1] : ".");
    if (!bundle)
    {
        return std::puts(bundle.error().text().c_str()), 7;
    }
    std::printf("%s is whole\n", iq::printable(bundle.value().manifest().name).c_str());
    auto engine = iq::Engine::load(std::make_shared<iq::Bundle>(std::move(bundle).value()));
    auto session = engine ? iq::TextSession::create(engine.value()) : engine.error();
    if (!session)
    {
        return std::puts(session.error().text().c_str()), 6;
    }
    auto step = session.value()->prefill({{1, 2, 3}}, {});
    for (int left = 20; step && left > 0; --left, step = session.value()->decode())
    {
        std::printf("%lld\n", static_cast<long long>(session.value()->tokens()[0]));
    }
    return step ? 0 : (std::puts(step.error().text().c_str()), 6);
}
