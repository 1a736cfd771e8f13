from ella_kd.cli import main

main()
